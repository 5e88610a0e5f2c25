"""Services that look after what belongs to no worker."""

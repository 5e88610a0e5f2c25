"""What ``docker/check`` does: build the images, run them as ``deploy/`` says, and measure them."""

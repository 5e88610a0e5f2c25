"""LoRA adapters, chosen by each job: files read and checked, and a bank of updates from which every row takes its own."""

from .adapters import Adapters, AdapterSet
from .bucket import Bucket
from .file import Adapter, Target, read
from .sources import Folder, Source

__all__ = ["Adapter", "AdapterSet", "Adapters", "Bucket", "Folder", "Source", "Target", "read"]

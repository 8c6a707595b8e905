"""Data: generated digits, folders of videos, and the loader that batches either. Import the submodules directly."""

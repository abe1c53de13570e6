"""Other people's checkpoints into ours: so far those of the paper's author."""

from chiaroscuro.convert.reference import Imported, import_reference, load_reference_checkpoint

__all__ = ["Imported", "import_reference", "load_reference_checkpoint"]

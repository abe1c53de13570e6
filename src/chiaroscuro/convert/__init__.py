"""Other people's weights into ours: the paper's author's checkpoints, and Llama's, these back again too."""

from chiaroscuro.convert.llama import from_llama, to_llama
from chiaroscuro.convert.reference import Imported, import_reference, load_reference_checkpoint

__all__ = ["Imported", "from_llama", "import_reference", "load_reference_checkpoint", "to_llama"]

"""Tables, pictures and pages: they show what was measured, and compute nothing."""

import chiaroscuro.lab  # noqa: F401

"""What one looks at: the routing of a text in the terminal, as a page, as a figure."""

import chiaroscuro.lab  # noqa: F401

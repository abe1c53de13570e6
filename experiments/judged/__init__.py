"""What other libraries' test suites need to judge our models. Nothing of theirs lies here."""

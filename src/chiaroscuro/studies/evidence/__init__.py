"""The questions that the paper leaves open, each answered by one recipe, one command, one picture and one sentence."""

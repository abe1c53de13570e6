"""The app: a window into a routed model, in the browser, on this machine alone."""

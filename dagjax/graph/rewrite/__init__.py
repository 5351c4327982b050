"""The same network in another form."""

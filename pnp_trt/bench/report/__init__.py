"""Tables, charts and an HTML page rendered from a results document."""

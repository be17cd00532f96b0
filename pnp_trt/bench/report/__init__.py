"""Tables, charts and the page that are drawn from a results document."""

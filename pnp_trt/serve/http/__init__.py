"""HTTP interfaces of a server: OpenAI's images, A1111's ``/sdapi/v1``, jobs, health, metrics and a page."""

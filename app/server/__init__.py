"""HTTP: Litestar routes in the shape of OpenAI's."""

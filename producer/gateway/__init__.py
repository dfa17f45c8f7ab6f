"""The HTTP gateway: OpenAI's API for those who hold a key. A thin shell over `producer.client`; any number may run."""

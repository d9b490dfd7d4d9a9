"""A server that speaks OpenAI's API: one base, any number of adapters, chosen by the model's name in the request.

``requests`` reads what a client sends, ``served`` holds the models, an engine (``llamacpp``, ``reference``) writes,
``replies`` puts what it writes into OpenAI's form, ``api`` ties them together over HTTP and ``run`` starts it all.
"""

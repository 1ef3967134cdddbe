"""The side of GPTQModel: the only folder, beside evaluation, that imports it."""

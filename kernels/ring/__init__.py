"""The KV of a layer that keeps only sink and local tokens: a ring, where tokens lie in it, and how
a graph names it before it is rewritten."""

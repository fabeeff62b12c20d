"""The empirical study of a trace: where tokens become right, which never do, and what is written behind those."""

"""The record: tables, queue, results and queries. Knows SQLAlchemy; knows no torch, no Ray."""

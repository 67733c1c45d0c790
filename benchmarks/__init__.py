"""Measurements that take minutes to hours: what the tables of the documentation are made from."""

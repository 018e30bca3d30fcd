"""Needs of a layout before a cluster is booked: parameters, memory, traffic, time; and the dry run of one rank."""

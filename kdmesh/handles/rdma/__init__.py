"""NIXL on either side of the RDMA door."""

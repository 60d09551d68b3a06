"""What bounds requests: room in the gateway, quotas of keys, and their accounts."""

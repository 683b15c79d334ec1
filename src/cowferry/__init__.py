"""cowferry: live storage."""

"""Predicted beside measured: real steps of tiny models on this machine's CPU, and what launchkit says of them."""

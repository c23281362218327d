"""Commands beside the road: inspect, export, caption."""

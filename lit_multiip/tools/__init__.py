"""Commands beside the road: inspect, caption."""

"""What a protection does to pictures, measured; what a run will take, estimated."""

"""What a federated segmentation method is: its configuration, the records of a round, and the aggregation."""

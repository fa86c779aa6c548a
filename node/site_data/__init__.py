"""What methods of federated segmentation need of a site's store: training slices, scores, single objects."""

"""What any medical-imaging program has: volumes, DICOM, finding cases, slices and the way back to the image's grid."""

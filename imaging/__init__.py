"""What any medical-imaging program needs: volumes, DICOM, finding cases, and resampling to slices and back."""

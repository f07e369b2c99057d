"""`spresso dashboard`: a page that follows a folder of runs, served to this machine alone. It changes nothing."""

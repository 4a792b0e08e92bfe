"""Files that other trainers load.  Each file imports its trainer; fastlora imports none of them."""

"""What `eagle doctor` looks at: each module returns findings and changes nothing but caches."""

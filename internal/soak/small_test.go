package soak

const childVariable = "LBPROXY_SOAK_CHILD"

func childMain() {}

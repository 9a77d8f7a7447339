module github.com/danielepagano/lbproxy/cluster

go 1.26.6

require (
	github.com/alicebob/miniredis/v2 v2.40.0
	github.com/danielepagano/lbproxy v0.0.0
	github.com/miekg/dns v1.1.73
	github.com/redis/rueidis v1.0.79
)

require (
	github.com/yuin/gopher-lua v1.1.1 // indirect
	golang.org/x/net v0.57.0 // indirect
	golang.org/x/sys v0.47.0 // indirect
)

replace github.com/danielepagano/lbproxy => ../

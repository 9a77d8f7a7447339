module github.com/danielepagano/lbproxy/internal/lab

go 1.26.6

require github.com/danielepagano/lbproxy v0.0.0

require github.com/pires/go-proxyproto v0.15.0

replace github.com/danielepagano/lbproxy => ../..

module github.com/danielepagano/lbproxy/internal/lab

go 1.26.6

require github.com/danielepagano/lbproxy v0.0.0

replace github.com/danielepagano/lbproxy => ../..

module github.com/danielepagano/lbproxy

go 1.26.6

package cluster

import _ "github.com/miekg/dns"

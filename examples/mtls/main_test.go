package main

import (
	"fmt"
	"os"
)

func Example() {
	if err := run(os.Stdout); err != nil {
		fmt.Println(err)
	}

	// Output:
	// client                           app   what it sees                         what the server logs
	// alice                            web   web-1 answers                        (nothing yet)
	// reporting                        web   web-2 answers                        done
	// reporting                        db    tls: bad certificate                 app-not-allowed
	// alice's serial from another CA   web   tls: unknown certificate authority   unknown-ca
	// no certificate                   web   tls: certificate required            no-certificate
	// alice, revoked by a reload       web   the connection ends                  revoked
	// alice, once more                 web   tls: bad certificate                 unknown-serial
	// reporting                        web   web-1 answers                        done
}

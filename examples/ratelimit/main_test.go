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
	// fred   100 bytes: done
	// fred  2000 bytes: cut
	// fred     1 bytes: refused
	// fay      1 bytes: done
	// fay      1 bytes: done
	// fay      1 bytes: done
	// fay      1 bytes: refused
	// paula 2000 bytes: done
	// paula 2000 bytes: done
	// paula 2000 bytes: done
	// paula 2000 bytes: done
}

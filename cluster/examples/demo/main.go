// Demo tells a short story of two proxies that act as one: a limit holds across both, one of them
// is killed and its clients find the other, and a new configuration reaches them through the store.
// Everything is on loopback, and the store is in memory: nothing has to be installed.
//
//	go run ./examples/demo
//	go run ./examples/demo -break limit   # sabotage that part: the story notices
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is main with its environment as arguments. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	sabotage := flags.String("break", "", "sabotage the `part`: limit, kill or config")
	verbose := flags.Bool("v", false, "show the logs of all parts")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	switch *sabotage {
	case "", "limit", "kill", "config":
	default:
		fmt.Fprintf(stderr, "demo: -break %q: want limit, kill or config\n", *sabotage)
		return 2
	}
	log := slog.New(slog.DiscardHandler)
	if *verbose {
		log = slog.New(slog.NewTextHandler(stderr, nil))
	}
	if err := demo(ctx, stdout, log, *sabotage); err != nil {
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return 1
	}
	return 0
}

//! The only program of domain 0 in `cargo xtask xen`: runs each scenario on real Xen.
//!
//! As the first process, it mounts file systems, loads modules, starts itself again for the
//! scenarios, and turns the machine off. If the second process dies, a third one continues with
//! the next scenario. Each prints lines that `cargo xtask xen` reads.

use std::io::{self, BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use verify_xen::outcome::{Outcome, Stop};
use verify_xen::real::{boot, figures, judge, Real};
use verify_xen::scenarios;
use verify_xen::vhost_user::{requests_complete, Rings};
use verify_xen::world::World;

/// The place and message of the last panic.
static PANIC: Mutex<String> = Mutex::new(String::new());

fn main() {
    if std::process::id() == 1 {
        println!("xen: BEGIN");
        match boot::set_up().and_then(|()| supervise()) {
            Ok(()) => println!("xen: END"),
            Err(error) => println!("xen: FAILED boot: {error}"),
        }
        boot::power_off()
    }
    let from = std::env::args().nth(1).and_then(|from| from.parse().ok());
    play(from.unwrap_or(0));
}

/// Starts processes until each scenario has been played.
fn supervise() -> io::Result<()> {
    let mut begun = 0;
    loop {
        let mut child = Command::new("/proc/self/exe")
            .arg(begun.to_string())
            .stdout(Stdio::piped())
            .spawn()?;
        let before = begun;
        for line in child
            .stdout
            .take()
            .into_iter()
            .flat_map(|pipe| BufReader::new(pipe).lines())
        {
            let line = line?;
            begun += usize::from(line.starts_with("xen: RUN"));
            println!("{line}");
        }
        let status = child.wait()?;
        if status.success() {
            return Ok(());
        }
        if let Some(signal) = status.signal() {
            println!("killed by signal {signal}");
        }
        if begun == before {
            return Err(io::Error::other(format!(
                "the scenarios ended with {status}"
            )));
        }
    }
}

/// Plays the scenarios, starting at number `from`.
fn play(from: usize) {
    panic::set_hook(Box::new(|info| {
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
    }));
    let mut number = 0;
    let mut run = |name: &str, scenario: &dyn Fn(&mut Real) -> Outcome| {
        number += 1;
        if number > from {
            one(name, scenario);
        }
    };
    run("judge", &judge);
    for scenario in scenarios::all() {
        run(scenario.name, &|world| scenario.play(world));
    }
    run("vhost_user_with_rings_mapped_in_advance", &|world| {
        requests_complete(world, Rings::InAdvance)
    });
    run("vhost_user_with_rings_mapped_on_demand", &|world| {
        requests_complete(world, Rings::OnDemand)
    });
    run("figures", &|world| {
        for line in figures(world)? {
            println!("xen: NOTE {line}");
        }
        Ok(())
    });
}

/// Plays one scenario in a new domain, and prints how it ended.
fn one(name: &str, scenario: &dyn Fn(&mut Real) -> Outcome) {
    println!("xen: RUN {name}");
    let played = panic::catch_unwind(AssertUnwindSafe(|| {
        let mut world = Real::new()?;
        scenario(&mut world)?;
        let wrong = world.audit();
        assert!(wrong.is_empty(), "{wrong:?}");
        Ok(())
    }));
    match played {
        Ok(Ok(())) => println!("xen: PASSED {name}"),
        Ok(Err(Stop::Skipped(reason))) => println!("xen: SKIPPED {name}: {reason}"),
        Ok(Err(stop)) => println!("xen: FAILED {name}: {stop:?}"),
        Err(_) => {
            let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
            println!("xen: FAILED {name}: {}", panic.replace('\n', " "));
        }
    }
}

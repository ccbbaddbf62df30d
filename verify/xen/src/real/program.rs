//! The first process of domain 0: runs scenarios in processes of its own, and reports on the
//! console. `cargo xtask xen` reads the lines.

use std::fmt;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use super::{boot, Real};
use crate::environment::Environment;
use crate::outcome::{Outcome, Stop};

/// The seconds after which a scenario is killed by SIGALRM.
const LIMIT_SECONDS: u32 = 120;

/// The place and message of the last panic.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// A named step of the program.
pub struct Step<'a> {
    name: &'a str,
    run: Box<dyn Fn(&mut Real) -> Outcome + 'a>,
}

impl<'a> Step<'a> {
    /// Creates a step.
    pub fn new(name: &'a str, run: impl Fn(&mut Real) -> Outcome + 'a) -> Self {
        let run = Box::new(run);
        Self { name, run }
    }
}

impl fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Step").field(&self.name).finish()
    }
}

/// Runs the steps and turns the machine off.
///
/// As the first process, it mounts file systems, loads modules, and starts itself again for the
/// steps. If the second process dies, a third one continues with the next step.
pub fn main(steps: &[Step<'_>]) {
    if std::process::id() == 1 {
        println!("xen: BEGIN");
        match boot::set_up().and_then(|()| supervise()) {
            Ok(()) => println!("xen: END"),
            Err(error) => println!("xen: FAILED boot: {error}"),
        }
        boot::power_off()
    }
    let from = std::env::args().nth(1).and_then(|from| from.parse().ok());
    panic::set_hook(Box::new(|info| {
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
    }));
    for step in steps.iter().skip(from.unwrap_or(0)) {
        run(step);
    }
}

/// Starts processes until each step has been run.
fn supervise() -> io::Result<()> {
    let mut begun = 0;
    loop {
        let mut child = Command::new("/proc/self/exe")
            .arg(begun.to_string())
            .stdout(Stdio::piped())
            .spawn()?;
        let (before, mut running) = (begun, None);
        let output = child.stdout.take().into_iter();
        for line in output.flat_map(|pipe| BufReader::new(pipe).lines()) {
            let line = line?;
            match line.strip_prefix("xen: RUN ") {
                Some(name) => (begun, running) = (begun + 1, Some(name.to_owned())),
                None if line.starts_with("xen: NOTE") => {}
                None if line.starts_with("xen: ") => running = None,
                None => {}
            }
            println!("{line}");
        }
        let status = child.wait()?;
        match running {
            Some(name) => println!("xen: FAILED {name}: {}", end(status)),
            None if status.success() => return Ok(()),
            None => {}
        }
        if begun == before {
            return Err(io::Error::other(format!("the steps ended with {status}")));
        }
    }
}

/// Describes how a process died.
fn end(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGALRM) => format!("hangs for {LIMIT_SECONDS} s"),
        Some(signal) => format!("signal {signal}"),
        None => status.to_string(),
    }
}

/// Runs one step in a new domain, and prints how it ended.
fn run(Step { name, run }: &Step<'_>) {
    println!("xen: RUN {name}");
    // SAFETY: the call sets a timer, and accesses no memory. The action of SIGALRM is the default.
    unsafe { libc::alarm(LIMIT_SECONDS) };
    let result = panic::catch_unwind(AssertUnwindSafe(|| {
        let mut env = Real::new()?;
        run(&mut env)?;
        let wrong = env.audit();
        assert!(wrong.is_empty(), "{wrong:?}");
        Ok(())
    }));
    match result {
        Ok(Ok(())) => println!("xen: PASSED {name}"),
        Ok(Err(Stop::Skipped(reason))) => println!("xen: SKIPPED {name}: {reason}"),
        Ok(Err(stop)) => println!("xen: FAILED {name}: {stop:?}"),
        Err(_) => {
            let panic = PANIC.lock().unwrap_or_else(PoisonError::into_inner);
            println!("xen: FAILED {name}: {}", panic.replace('\n', " "));
        }
    }
}

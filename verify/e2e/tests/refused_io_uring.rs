//! A ring returns the error of a seccomp filter that refuses io_uring, as in many containers. The
//! filter stays in force, so this is the only test of its program.

use e2e::uring::Ring;

#[test]
#[expect(unsafe_code, reason = "prctl takes a pointer")]
fn ring_refused_by_seccomp_returns_the_error_of_the_filter() {
    let statement = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let setup = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let refuse = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let mut filter = [
        // The first word of `struct seccomp_data` is the number of the system call.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, setup),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, refuse),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: this call takes no pointer. It sets a flag of the thread.
    let flag = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(flag, 0);
    // SAFETY: the kernel reads the program and its statements, which exist until the call returns.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let error = Ring::new().err().and_then(|e| e.raw_os_error());
    assert_eq!(error, Some(libc::EPERM));
}

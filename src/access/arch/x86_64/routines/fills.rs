//! Fills.

use core::arch::naked_asm;

/// Fills with stores that overlap. For 64 bytes or more, four such stores follow a loop.
///
/// # Safety
///
/// `rdi` is valid for writes of `rcx` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn fill_vectors() {
    naked_asm!(
        "2:",
        "cmp rcx, 16",
        "jb 5f",
        "movq xmm0, rsi",
        "punpcklqdq xmm0, xmm0",
        "lea rdx, [rdi + rcx - 16]",
        "cmp rcx, 64",
        "jb 4f",
        "lea rax, [rdi + rcx - 64]",
        "6:",
        "movups xmmword ptr [rdi], xmm0",
        "movups xmmword ptr [rdi + 16], xmm0",
        "movups xmmword ptr [rdi + 32], xmm0",
        "movups xmmword ptr [rdi + 48], xmm0",
        "add rdi, 64",
        "cmp rdi, rax",
        "jb 6b",
        "movups xmmword ptr [rax], xmm0",
        "movups xmmword ptr [rax + 16], xmm0",
        "movups xmmword ptr [rax + 32], xmm0",
        "movups xmmword ptr [rdx], xmm0",
        "jmp 19f",
        "4:", // 16 to 63
        "movups xmmword ptr [rdi], xmm0",
        "movups xmmword ptr [rdx], xmm0",
        "cmp rcx, 32",
        "jbe 19f",
        "movups xmmword ptr [rdi + 16], xmm0",
        "movups xmmword ptr [rdx - 16], xmm0",
        "jmp 19f",
        "5:",
        "cmp rcx, 8",
        "jb 7f",
        "mov qword ptr [rdi], rsi",
        "mov qword ptr [rdi + rcx - 8], rsi",
        "jmp 19f",
        "7:",
        "cmp rcx, 4",
        "jb 8f",
        "mov dword ptr [rdi], esi",
        "mov dword ptr [rdi + rcx - 4], esi",
        "jmp 19f",
        "8:",
        "test rcx, rcx",
        "jz 19f",
        "mov byte ptr [rdi], sil",
        "mov byte ptr [rdi + rcx - 1], sil",
        "shr rcx, 1",
        "mov byte ptr [rdi + rcx], sil",
        "19:",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Fills byte by byte, in ascending order.
///
/// # Safety
///
/// `rdi` is valid for writes of `rcx` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn fill_ascending() {
    naked_asm!(
        "2:",
        "mov eax, esi",
        "rep stosb",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

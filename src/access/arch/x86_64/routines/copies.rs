//! Copies of bytes: routines for each length and set of processor features, and routines for
//! ranges that overlap.

use core::arch::naked_asm;

/// The longest copy that [`small_bytes`] takes.
pub(in crate::access::arch) const SMALL_MAX: usize = 128;

/// Copies at most 128 bytes, and reads all of them before it writes any.
///
/// 1, 2, 4 and 8 bytes take one load and one store, so they are not torn if they are aligned. Other
/// lengths take moves that are adjacent or overlap.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes. `rcx` is at most 128.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn small_bytes() {
    naked_asm!(
        "2:",
        "cmp rcx, 16",
        "ja 20f",
        "cmp rcx, 8",
        "ja 13f",
        "je 18f",
        "cmp rcx, 4",
        "ja 12f",
        "je 14f",
        "cmp rcx, 2",
        "ja 16f",
        "je 15f",
        "test rcx, rcx",
        "jz 19f",
        "movzx eax, byte ptr [rsi]",
        "mov byte ptr [rdi], al",
        "jmp 19f",
        "15:",
        "movzx eax, word ptr [rsi]",
        "mov word ptr [rdi], ax",
        "jmp 19f",
        "14:",
        "mov eax, dword ptr [rsi]",
        "mov dword ptr [rdi], eax",
        "jmp 19f",
        "18:",
        "mov rax, qword ptr [rsi]",
        "mov qword ptr [rdi], rax",
        "jmp 19f",
        "16:", // 3
        "movzx eax, word ptr [rsi]",
        "movzx edx, byte ptr [rsi + 2]",
        "mov word ptr [rdi], ax",
        "mov byte ptr [rdi + 2], dl",
        "jmp 19f",
        "12:", // 5 to 7
        "mov eax, dword ptr [rsi]",
        "mov edx, dword ptr [rsi + rcx - 4]",
        "mov dword ptr [rdi], eax",
        "mov dword ptr [rdi + rcx - 4], edx",
        "jmp 19f",
        "13:", // 9 to 16
        "mov rax, qword ptr [rsi]",
        "mov rdx, qword ptr [rsi + rcx - 8]",
        "mov qword ptr [rdi], rax",
        "mov qword ptr [rdi + rcx - 8], rdx",
        "jmp 19f",
        "20:", // 17 to 128
        "movups xmm0, xmmword ptr [rsi]",
        "movups xmm1, xmmword ptr [rsi + rcx - 16]",
        "cmp rcx, 32",
        "jbe 17f",
        "movups xmm2, xmmword ptr [rsi + 16]",
        "movups xmm3, xmmword ptr [rsi + rcx - 32]",
        "cmp rcx, 64",
        "jbe 21f",
        "movups xmm4, xmmword ptr [rsi + 32]",
        "movups xmm5, xmmword ptr [rsi + 48]",
        "movups xmm6, xmmword ptr [rsi + rcx - 64]",
        "movups xmm7, xmmword ptr [rsi + rcx - 48]",
        "movups xmmword ptr [rdi + 32], xmm4",
        "movups xmmword ptr [rdi + 48], xmm5",
        "movups xmmword ptr [rdi + rcx - 64], xmm6",
        "movups xmmword ptr [rdi + rcx - 48], xmm7",
        "21:",
        "movups xmmword ptr [rdi + 16], xmm2",
        "movups xmmword ptr [rdi + rcx - 32], xmm3",
        "17:",
        "movups xmmword ptr [rdi], xmm0",
        "movups xmmword ptr [rdi + rcx - 16], xmm1",
        "19:",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies at least 32 bytes with vectors of 16 bytes.
///
/// Up to 128 bytes are copied by [`small_bytes`]. More bytes are copied 64 at a time. The last 64
/// bytes are read first and written last.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is at
/// least 32.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn middle_sse() {
    naked_asm!(
        "cmp rcx, 128",
        "jbe {small_bytes}",
        "2:",
        "movups xmm4, xmmword ptr [rsi + rcx - 64]",
        "movups xmm5, xmmword ptr [rsi + rcx - 48]",
        "movups xmm6, xmmword ptr [rsi + rcx - 32]",
        "movups xmm7, xmmword ptr [rsi + rcx - 16]",
        "sub rcx, 64",
        "xor edx, edx",
        "4:",
        "movups xmm0, xmmword ptr [rsi + rdx]",
        "movups xmm1, xmmword ptr [rsi + rdx + 16]",
        "movups xmm2, xmmword ptr [rsi + rdx + 32]",
        "movups xmm3, xmmword ptr [rsi + rdx + 48]",
        "movups xmmword ptr [rdi + rdx], xmm0",
        "movups xmmword ptr [rdi + rdx + 16], xmm1",
        "movups xmmword ptr [rdi + rdx + 32], xmm2",
        "movups xmmword ptr [rdi + rdx + 48], xmm3",
        "add rdx, 64",
        "cmp rdx, rcx",
        "jb 4b",
        "movups xmmword ptr [rdi + rcx], xmm4",
        "movups xmmword ptr [rdi + rcx + 16], xmm5",
        "movups xmmword ptr [rdi + rcx + 32], xmm6",
        "movups xmmword ptr [rdi + rcx + 48], xmm7",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
        small_bytes = sym small_bytes,
    )
}

/// Copies at least 32 bytes with vectors of 32 bytes.
///
/// Up to 128 bytes are all read before any is written. For more bytes, it copies the first vector
/// to the unaligned destination, and then 128 bytes at a time to aligned addresses. It reads the
/// last 128 bytes before the loop, and writes them after it.
///
/// A load waits for an earlier store whose address is the same modulo 4096. So the loop descends if
/// the destination is 1 to 2048 bytes above the source, modulo 4096.
///
/// The loop copies each byte that the first vector and the last 128 bytes leave, and none outside
/// the range. Let `n` be the length. Then:
///
/// - At label 4, `rcx` is `n - 128`, where the last 128 bytes begin. `rdx` is the offset of the
///   next 128 bytes, and changes by `rax`, which is 128 or -128.
/// - The first aligned offset `a` is at most 31, so the first vector covers the bytes below it. If
///   it is not below `rcx`, the last 128 bytes cover all others.
/// - An offset below `rcx` is at most `n - 129`, so its 128 bytes are in the range.
/// - Ascending offsets are `a`, `a + 128` and so on. The first one that is not below `rcx` ends the
///   loop, and the last 128 bytes cover what is above it.
/// - The descending ones are the same in reverse. `a + ((rcx - 1 - a) & -128)` is the largest of
///   them that is below `rcx`. The one after `a` wraps below 0, and is not below `rcx`.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is at
/// least 32. The processor has AVX.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn middle_avx() {
    naked_asm!(
        "2:",
        "vmovups ymm0, ymmword ptr [rsi]",
        "vmovups ymm7, ymmword ptr [rsi + rcx - 32]",
        "cmp rcx, 64",
        "jbe 6f",
        "vmovups ymm6, ymmword ptr [rsi + rcx - 64]",
        "cmp rcx, 128",
        "jbe 7f",
        "vmovups ymm5, ymmword ptr [rsi + rcx - 96]",
        "vmovups ymm4, ymmword ptr [rsi + rcx - 128]",
        "sub rcx, 128",
        "vmovups ymmword ptr [rdi], ymm0",
        "mov rdx, rdi",
        "neg rdx",
        "and edx, 31", // a
        "cmp rdx, rcx",
        "jae 5f",
        "lea eax, [rdi - 1]", // destination - 1 - source, whose bit 11 says which way
        "sub eax, esi",
        "test eax, 2048",
        "mov eax, 128",
        "jnz 4f",             // ascending
        "lea rax, [rcx - 1]", // a + ((rcx - 1 - a) & -128)
        "sub rax, rdx",
        "and rax, -128",
        "add rdx, rax",
        "mov rax, -128",
        "4:",
        "vmovups ymm0, ymmword ptr [rsi + rdx]",
        "vmovups ymm1, ymmword ptr [rsi + rdx + 32]",
        "vmovups ymm2, ymmword ptr [rsi + rdx + 64]",
        "vmovups ymm3, ymmword ptr [rsi + rdx + 96]",
        "vmovups ymmword ptr [rdi + rdx], ymm0",
        "vmovups ymmword ptr [rdi + rdx + 32], ymm1",
        "vmovups ymmword ptr [rdi + rdx + 64], ymm2",
        "vmovups ymmword ptr [rdi + rdx + 96], ymm3",
        "add rdx, rax",
        "cmp rdx, rcx",
        "jb 4b",
        "5:",
        "vmovups ymmword ptr [rdi + rcx], ymm4",
        "vmovups ymmword ptr [rdi + rcx + 32], ymm5",
        "vmovups ymmword ptr [rdi + rcx + 64], ymm6",
        "vmovups ymmword ptr [rdi + rcx + 96], ymm7",
        "jmp 8f",
        "7:", // 65 to 128
        "vmovups ymm1, ymmword ptr [rsi + 32]",
        "vmovups ymmword ptr [rdi + 32], ymm1",
        "vmovups ymmword ptr [rdi + rcx - 64], ymm6",
        "6:", // 32 to 64
        "vmovups ymmword ptr [rdi], ymm0",
        "vmovups ymmword ptr [rdi + rcx - 32], ymm7",
        "8:",
        "xor eax, eax",
        "3:",
        "vzeroupper",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies at least 32 bytes with vectors of 64 bytes.
///
/// Up to 256 bytes are all read before any is written. More are copied as by [`middle_avx`], 256 at
/// a time. Registers `zmm16` to `zmm31` need no `vzeroupper`.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is at
/// least 32. The processor has AVX-512VL.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn middle_avx512() {
    naked_asm!(
        "2:",
        "cmp rcx, 64",
        "jb 6f",
        "vmovdqu64 zmm16, zmmword ptr [rsi]",
        "vmovdqu64 zmm23, zmmword ptr [rsi + rcx - 64]",
        "cmp rcx, 128",
        "ja 7f",
        "vmovdqu64 zmmword ptr [rdi], zmm16",
        "vmovdqu64 zmmword ptr [rdi + rcx - 64], zmm23",
        "xor eax, eax",
        "ret",
        "6:", // 32 to 63
        "vmovdqu64 ymm16, ymmword ptr [rsi]",
        "vmovdqu64 ymm17, ymmword ptr [rsi + rcx - 32]",
        "vmovdqu64 ymmword ptr [rdi], ymm16",
        "vmovdqu64 ymmword ptr [rdi + rcx - 32], ymm17",
        "xor eax, eax",
        "ret",
        "7:",
        "vmovdqu64 zmm22, zmmword ptr [rsi + rcx - 128]",
        "cmp rcx, 256",
        "ja 8f",
        "vmovdqu64 zmm17, zmmword ptr [rsi + 64]",
        "vmovdqu64 zmmword ptr [rdi], zmm16",
        "vmovdqu64 zmmword ptr [rdi + 64], zmm17",
        "vmovdqu64 zmmword ptr [rdi + rcx - 128], zmm22",
        "vmovdqu64 zmmword ptr [rdi + rcx - 64], zmm23",
        "xor eax, eax",
        "ret",
        "8:",
        "vmovdqu64 zmm21, zmmword ptr [rsi + rcx - 192]",
        "vmovdqu64 zmm20, zmmword ptr [rsi + rcx - 256]",
        "sub rcx, 256",
        "vmovdqu64 zmmword ptr [rdi], zmm16",
        "mov rdx, rdi",
        "neg rdx",
        "and edx, 63",
        "cmp rdx, rcx",
        "jae 5f",
        "lea eax, [rdi - 1]",
        "sub eax, esi",
        "test eax, 2048",
        "mov eax, 256",
        "jnz 4f",
        "lea rax, [rcx - 1]",
        "sub rax, rdx",
        "and rax, -256",
        "add rdx, rax",
        "mov rax, -256",
        "4:",
        "vmovdqu64 zmm16, zmmword ptr [rsi + rdx]",
        "vmovdqu64 zmm17, zmmword ptr [rsi + rdx + 64]",
        "vmovdqu64 zmm18, zmmword ptr [rsi + rdx + 128]",
        "vmovdqu64 zmm19, zmmword ptr [rsi + rdx + 192]",
        "vmovdqu64 zmmword ptr [rdi + rdx], zmm16",
        "vmovdqu64 zmmword ptr [rdi + rdx + 64], zmm17",
        "vmovdqu64 zmmword ptr [rdi + rdx + 128], zmm18",
        "vmovdqu64 zmmword ptr [rdi + rdx + 192], zmm19",
        "add rdx, rax",
        "cmp rdx, rcx",
        "jb 4b",
        "5:",
        "vmovdqu64 zmmword ptr [rdi + rcx], zmm20",
        "vmovdqu64 zmmword ptr [rdi + rcx + 64], zmm21",
        "vmovdqu64 zmmword ptr [rdi + rcx + 128], zmm22",
        "vmovdqu64 zmmword ptr [rdi + rcx + 192], zmm23",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies more than 128 bytes with `rep movsb`, once the destination is aligned to a cache line.
///
/// If the destination is less than 32 bytes above the source modulo 4096, AMD's Zen 4 executes
/// `rep movsb` up to 16 times slower. The routine for shorter copies moves these bytes. It is found
/// by [`middle_undetected`], because a crate of type `dylib` cannot refer to a static of this one.
/// At least 66 bytes are left then.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is
/// more than 128.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn rep_bytes() {
    naked_asm!(
        "2:",
        "movups xmm0, xmmword ptr [rsi]",
        "movups xmm1, xmmword ptr [rsi + 16]",
        "movups xmm2, xmmword ptr [rsi + 32]",
        "movups xmm3, xmmword ptr [rsi + 48]",
        "movups xmmword ptr [rdi], xmm0",
        "movups xmmword ptr [rdi + 16], xmm1",
        "movups xmmword ptr [rdi + 32], xmm2",
        "movups xmmword ptr [rdi + 48], xmm3",
        "mov rdx, rdi",
        "neg rdx",
        "and edx, 63",
        "add rdi, rdx",
        "add rsi, rdx",
        "sub rcx, rdx",
        "mov eax, edi",
        "sub eax, esi",
        "and eax, 4095",
        "dec eax",
        "cmp eax, 31",
        "jb {middle}",
        "rep movsb",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
        middle = sym middle_undetected,
    )
}

/// Copies more than 128 bytes with stores that bypass the caches.
///
/// Once the destination is aligned to a cache line, it copies 16 KiB at a time: 64 bytes of each of
/// four pages in turn. `rep movsb` copies the rest. The fence orders all of these stores before any
/// later one. It runs after a fault as well.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is
/// more than 128. The processor has AVX.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn streaming_avx() {
    naked_asm!(
        "2:",
        "vmovups ymm0, ymmword ptr [rsi]",
        "vmovups ymm1, ymmword ptr [rsi + 32]",
        "vmovups ymmword ptr [rdi], ymm0",
        "vmovups ymmword ptr [rdi + 32], ymm1",
        "mov rdx, rdi",
        "neg rdx",
        "and edx, 63",
        "add rdi, rdx",
        "add rsi, rdx",
        "sub rcx, rdx",
        "sub rcx, 16384",
        "jb 6f",
        "4:",
        "mov edx, 64",
        "5:",
        "vmovups ymm0, ymmword ptr [rsi]",
        "vmovups ymm1, ymmword ptr [rsi + 32]",
        "vmovups ymm2, ymmword ptr [rsi + 4096]",
        "vmovups ymm3, ymmword ptr [rsi + 4128]",
        "vmovups ymm4, ymmword ptr [rsi + 8192]",
        "vmovups ymm5, ymmword ptr [rsi + 8224]",
        "vmovups ymm6, ymmword ptr [rsi + 12288]",
        "vmovups ymm7, ymmword ptr [rsi + 12320]",
        "vmovntps ymmword ptr [rdi], ymm0",
        "vmovntps ymmword ptr [rdi + 32], ymm1",
        "vmovntps ymmword ptr [rdi + 4096], ymm2",
        "vmovntps ymmword ptr [rdi + 4128], ymm3",
        "vmovntps ymmword ptr [rdi + 8192], ymm4",
        "vmovntps ymmword ptr [rdi + 8224], ymm5",
        "vmovntps ymmword ptr [rdi + 12288], ymm6",
        "vmovntps ymmword ptr [rdi + 12320], ymm7",
        "add rsi, 64",
        "add rdi, 64",
        "dec edx",
        "jnz 5b",
        "add rsi, 12288",
        "add rdi, 12288",
        "sub rcx, 16384",
        "jae 4b",
        "6:",
        "add rcx, 16384",
        "rep movsb",
        "xor eax, eax",
        "3:",
        "sfence",
        "vzeroupper",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Detects which routine to use, and jumps to it with the same operands.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes, which do not overlap. `rcx` is at
/// least 32.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn middle_undetected() {
    // The stack is aligned before a routine is called. The return address and seven registers keep
    // it aligned.
    naked_asm!(
        "push rdi",
        "push rsi",
        "push rcx",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "call {detect}",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rcx",
        "pop rsi",
        "pop rdi",
        "jmp rax",
        detect = sym super::super::select::detect_middle_copy,
    )
}

/// Copies byte by byte, in ascending order.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn ascending_bytes() {
    naked_asm!(
        "2:",
        "rep movsb",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

/// Copies in descending order, for a destination above the source that may overlap it.
///
/// It copies eight bytes at a time and reads them before it writes them. As the destination is
/// higher, no step overwrites bytes that a later step reads.
///
/// # Safety
///
/// `rsi` is valid for reads and `rdi` for writes of `rcx` bytes.
#[unsafe(naked)]
pub(in crate::access::arch) unsafe extern "sysv64" fn descending_bytes() {
    naked_asm!(
        "2:",
        "cmp rcx, 8",
        "jb 4f",
        "mov rax, qword ptr [rsi + rcx - 8]",
        "mov qword ptr [rdi + rcx - 8], rax",
        "sub rcx, 8",
        "jmp 2b",
        "4:",
        "test rcx, rcx",
        "jz 5f",
        "movzx eax, byte ptr [rsi + rcx - 1]",
        "mov byte ptr [rdi + rcx - 1], al",
        "dec rcx",
        "jmp 4b",
        "5:",
        "xor eax, eax",
        "3:",
        "ret",
        fault_entry!("2b", "3b", "3b", "1"),
    )
}

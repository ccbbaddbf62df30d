# The built-in guest. guest.rs assembles it and replaces the names in braces.
#
# RDI, RSI: distance between two pattern words in the low and in the high region.
# RBX: registers of the device. R12: current chunk. R13: index of the available ring.

    mov r14, rdi
    mov r15, rsi
    lea rsi, [rip + .Lguest_hello]
    call .Lguest_print

    # Write a word to pages all over RAM, and then read all of them back. The check fails if the
    # regions share memory.
    mov r8d, 1
.Lguest_pattern:
    mov rdi, {low_pattern}
    mov rdx, r14
    call .Lguest_words
    mov rdi, {high_pattern}
    mov rdx, r15
    call .Lguest_words
    dec r8d
    jns .Lguest_pattern
    lea rsi, [rip + .Lguest_memory]
    call .Lguest_print

    # Set up the device: write the registers in the table.
    mov ebx, {mmio}
    mov esi, {setup}
    mov ecx, {setup_len}
.Lguest_register:
    lodsd
    mov edx, eax
    lodsd
    mov [rbx + rdx], eax
    dec ecx
    jnz .Lguest_register
    cmp dword ptr [rbx + {status}], 15
    jne .Lguest_fail
    xor r13d, r13d

    # Copy the first half of the disk to the second, chunk by chunk.
    xor r12d, r12d
.Lguest_copy:
    xor esi, esi
    imul rdx, r12, {chunk_sectors}
    xor edi, edi
    call .Lguest_request
    mov esi, 1
    lea rdx, [r12 + {chunks}]
    imul rdx, rdx, {chunk_sectors}
    xor edi, edi
    call .Lguest_request
    inc r12d
    cmp r12d, {chunks}
    jb .Lguest_copy
    xor r12d, r12d
    mov esi, 4
    xor edx, edx
    xor edi, edi
    call .Lguest_request
    lea rsi, [rip + .Lguest_disk]
    call .Lguest_print

    # The device must refuse a read past the end.
    xor esi, esi
    mov rdx, -1
    mov edi, 1
    call .Lguest_request
    lea rsi, [rip + .Lguest_refused]
    call .Lguest_print
    xor eax, eax
    jmp .Lguest_exit

.Lguest_fail:
    mov eax, 1
.Lguest_exit:
    mov edx, {debug_exit}
    out dx, al
    hlt

# Writes (R8 = 1) or checks (R8 = 0) the pattern starting at RDI: a word with its own address every
# RDX bytes.
.Lguest_words:
    mov ecx, {pattern_words}
.Lguest_word:
    test r8d, r8d
    jz .Lguest_check
    mov [rdi], rdi
.Lguest_check:
    cmp [rdi], rdi
    jne .Lguest_fail
    add rdi, rdx
    dec ecx
    jnz .Lguest_word
    ret

# Sends a request of type ESI for sector RDX, and waits for it. Its status must be EDI.
.Lguest_request:
    mov r8d, {request}
    mov [r8], rsi
    mov [r8 + 8], rdx
    mov byte ptr [r8 + 16], 255
    # Four descriptors: header, two data buffers, status. The device writes to the buffers of a
    # read.
    mov r9d, {desc}
    mov [r9], r8
    mov rax, 0x0001000100000010
    cmp esi, 4
    jne .Lguest_has_data
    mov rax, 0x0003000100000010
.Lguest_has_data:
    mov [r9 + 8], rax
    xor ecx, ecx
    test esi, esi
    setz cl
    lea ecx, [rcx + rcx + 1]
    shl rcx, 32
    imul rax, r12, {half}
    add rax, {low_buffers}
    mov [r9 + 16], rax
    mov rax, 0x0002000000000000 + {half}
    or rax, rcx
    mov [r9 + 24], rax
    imul rax, r12, {half}
    mov rdx, {high_buffers}
    add rax, rdx
    mov [r9 + 32], rax
    mov rax, 0x0003000000000000 + {half}
    or rax, rcx
    mov [r9 + 40], rax
    lea rax, [r8 + 16]
    mov [r9 + 48], rax
    mov rax, 0x0000000200000001
    mov [r9 + 56], rax
    # Every entry of the available ring is 0, the head of the only chain.
    inc r13w
    mov [{avail} + 2], r13w
    mov dword ptr [rbx + {queue_notify}], 0
    mov rdx, {used}
.Lguest_wait:
    cmp [rdx + 2], r13w
    jne .Lguest_wait
    mov eax, [rbx + {interrupt_status}]
    mov [rbx + {interrupt_ack}], eax
    movzx eax, byte ptr [r8 + 16]
    cmp eax, edi
    jne .Lguest_fail
    ret

# Prints the text at RSI.
.Lguest_print:
    mov edx, {com1}
.Lguest_char:
    lodsb
    test al, al
    jz .Lguest_printed
    out dx, al
    jmp .Lguest_char
.Lguest_printed:
    ret

.Lguest_hello:   .asciz "64-bit guest\n"
.Lguest_memory:  .asciz "memory: wrote a pattern to both regions and read it back\n"
.Lguest_disk:    .asciz "disk:   copied the first half to the second\n"
.Lguest_refused: .asciz "disk:   a read past the end failed, as expected\n"

/* SPDX-License-Identifier: Apache-2.0
 *
 * From the 32-bit entry to ring 3 in as few instructions as possible: the first gigabyte's page tables are ready-made
 * data, so nothing is built here. (On a nested KVM without hardware paging, ring 0 is interpreted; ring 3 is native.)
 *
 * The selectors are Linux's, __USER_CS 0x33 and __USER_DS 0x2b: that nested KVM runs no others natively.
 */
#include "amig_guest.h"

#define KERNEL_CS 0x10
#define KERNEL_DS 0x18
#define USER_DS 0x2b
#define USER_CS 0x33
#define TSS_SELECTOR 0x40
#define STACK_SIZE 8192
#define FAULT_STACK_SIZE 512
#define TSS_SIZE 128
#define IO_BITMAP_SIZE 8192
#define RFLAGS_USER 0x3002 /* IOPL 3, interrupts off */

    .section .note.amig, "a", @note
    .balign 4
    .long 4, 4, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry
    .balign 4
    .long 5, 16, AMIG_NOTE_BOOT
    .asciz "amig"
    .balign 4
    .long AMIG_GUEST_ABI, ap_entry, AMIG_STATUS_GPA, AMIG_MAX_CPUS

    .section .text.entry, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    xorl %edi, %edi
ap_entry:
    cmpl $AMIG_MAX_CPUS, %edi
    jae 3f
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0x20, %eax /* PAE */
    movl %eax, %cr4
    movl $0xc0000080, %ecx /* EFER */
    xorl %edx, %edx
    movl $0x100, %eax /* LME */
    wrmsr
    movl $0x80000031, %eax /* PG, NE, ET, PE */
    movl %eax, %cr0
    lgdt gdt_pointer
    ljmp $KERNEL_CS, $1f
3:  cli
    hlt
    jmp 3b

    .code64
1:  /* A task state segment for this vCPU. It says where exceptions find a stack, and that ring 3 may use all ports:
     * IOPL 3 says so too, but that nested KVM forgets it on the way to native ring 3. All share one bitmap of zeros. */
    movl %edi, %eax
    shll $7, %eax
    addl $tss_area, %eax
    movl %edi, %ecx
    incl %ecx
    imull $FAULT_STACK_SIZE, %ecx
    addl $fault_stacks, %ecx
    movl %ecx, 4(%rax)
    movl $io_bitmap, %edx
    subl %eax, %edx
    movw %dx, 102(%rax)
    movl %eax, %ecx
    shll $16, %ecx
    leal IO_BITMAP_SIZE(%rcx,%rdx), %ecx /* the limit: up to the bitmap's end */
    movl %edi, %edx
    shll $4, %edx
    leal gdt_tss(%rdx), %esi
    addl $TSS_SELECTOR, %edx
    movl %ecx, (%rsi)
    movl %eax, %ecx
    shrl $16, %ecx
    orl $0x8900, %ecx /* the image ends far below 16 MiB: base 31..24 is 0 */
    movl %ecx, 4(%rsi)
    ltr %dx
    lidt idt_pointer
    xorl %eax, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %edi, %ecx
    incl %ecx
    shll $13, %ecx
    addl $stacks - 8, %ecx /* as if called: RSP is 8 below a multiple of 16 */
    leaq -64(%rcx), %rsp
    movl %ebx, %esi /* cpu_main(number, start info) */
    pushq $USER_DS
    pushq %rcx
    pushq $RFLAGS_USER
    pushq $USER_CS
    pushq $cpu_main
    iretq

/* Exceptions end the vCPU's work: hand over to fault_main() in ring 3, which tells the outside. */
    .balign 16
    .globl fault_stubs
fault_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17) || (vector == 21)
    .else
    pushq $0
    .endif
    pushq $vector
    jmp fault_common
    .set vector, vector + 1
    .endr
fault_common:
    xorl %edi, %edi
    str %di
    subl $TSS_SELECTOR, %edi
    shrl $4, %edi
    popq %rsi /* vector */
    popq %rdx /* error code */
    movq (%rsp), %rcx /* RIP */
    movq 24(%rsp), %r9 /* RSP */
    movq %cr2, %r8
    movl %edi, %eax
    incl %eax
    shll $13, %eax
    addl $stacks - 8, %eax
    movq %rax, 24(%rsp)
    movq $USER_DS, 32(%rsp)
    movq $RFLAGS_USER, 16(%rsp)
    movq $USER_CS, 8(%rsp)
    movq $fault_main, (%rsp)
    iretq

    .section .data.tables, "aw"
    .balign 4096
pml4:
    .quad pdpt + 0x27 /* present, writable, user, accessed */
    .fill 511, 8, 0
    .globl pdpt
pdpt:
    .quad pd0 + 0x27
    .fill 511, 8, 0
pd0: /* the first gigabyte in 2 MiB pages; accessed and dirty already, so that the walk writes nothing */
    .set page, 0
    .rept 512
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr

    .balign 16
gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff /* 0x10 ring 0 code, 64 bit */
    .quad 0x00cf93000000ffff /* 0x18 ring 0 data */
    .quad 0x00cffb000000ffff /* 0x23 ring 3 code, 32 bit (unused) */
    .quad 0x00cff3000000ffff /* 0x2b ring 3 data */
    .quad 0x00affb000000ffff /* 0x33 ring 3 code, 64 bit */
    .quad 0
gdt_tss:
    .fill AMIG_MAX_CPUS * 2, 8, 0
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

    .bss
    .balign 4096
    .globl idt
idt:
    .skip 4096
stacks:
    .skip AMIG_MAX_CPUS * STACK_SIZE
fault_stacks:
    .skip AMIG_MAX_CPUS * FAULT_STACK_SIZE
tss_area:
    .skip AMIG_MAX_CPUS * TSS_SIZE
io_bitmap:
    .skip IO_BITMAP_SIZE + 1

    .section .note.GNU-stack, "", @progbits

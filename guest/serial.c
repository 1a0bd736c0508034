/* SPDX-License-Identifier: Apache-2.0
 *
 * serial.c: lines of text on COM1. Each port access is an exit to the host, so a line is built first and then sent in
 * pieces as large as the transmitter's FIFO.
 */
#include "guest.h"

#define DATA AMIG_PORT_SERIAL
#define IER (DATA + 1)
#define FCR (DATA + 2)
#define LCR (DATA + 3)
#define MCR (DATA + 4)
#define LSR (DATA + 5)
#define LSR_THRE 0x20
#define FIFO 16
#define PATIENCE 20000 /* reads of LSR before the rest of a line is dropped: nobody listens */

void serial_setup(void)
{
    outb(IER, 0);
    outb(LCR, 0x80); /* divisor 1: 115200 baud */
    outb(DATA, 1);
    outb(IER, 0);
    outb(LCR, 0x03); /* 8n1 */
    outb(FCR, 0x07);
    outb(MCR, 0x03);
}

void serial_write(const char *text, u32 length)
{
    while (length) {
        u64 piece = length < FIFO ? length : FIFO;
        u32 tries = 0;

        length -= (u32)piece;
        while (!(inb(LSR) & LSR_THRE)) {
            if (++tries == PATIENCE)
                return;
            pause();
        }
        __asm__ volatile("rep outsb" : "+S"(text), "+c"(piece) : "d"(DATA) : "memory");
    }
}

void line_text(struct line *l, const char *text)
{
    while (*text && l->length < sizeof(l->text) - 2)
        l->text[l->length++] = *text++;
}

static void digits(struct line *l, u64 number, u32 base)
{
    char text[24];
    char *p = text + sizeof(text) - 1;

    *p = 0;
    do {
        *--p = "0123456789abcdef"[number % base];
        number /= base;
    } while (number);
    line_text(l, p);
}

void line_number(struct line *l, u64 number)
{
    digits(l, number, 10);
}

void line_hex(struct line *l, u64 number)
{
    line_text(l, "0x");
    digits(l, number, 16);
}

void line_field(struct line *l, const char *name, u64 number)
{
    line_text(l, " ");
    line_text(l, name);
    line_text(l, "=");
    line_number(l, number);
}

void line_send(struct line *l)
{
    l->text[l->length++] = '\r';
    l->text[l->length++] = '\n';
    serial_write(l->text, l->length);
    l->length = 0;
}

void *memset(void *to, int byte, u64 size)
{
    void *p = to;
    __asm__ volatile("rep stosb" : "+D"(p), "+c"(size) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, u64 size)
{
    void *p = to;
    __asm__ volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(size) : : "memory");
    return to;
}

// What the page does by itself: files dropped anywhere, and the picture sliders for keyboard and screen readers.
() => {
    if (window.trimtabPage) return;
    window.trimtabPage = true;

    // A file dropped where no component takes it goes to the button that opens pictures made here.
    const input = document.querySelector('#top input[type=file]');
    const taken = (event) => event.target.closest?.('button, input, textarea, [data-testid=image], .image-container');
    const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
    const show = (on) => document.body.classList.toggle('dropping', on);
    document.addEventListener('dragover', (event) => {
        if (!hasFiles(event)) return;
        show(!taken(event));
        if (!taken(event)) event.preventDefault();
    });
    document.addEventListener('dragleave', (event) => { if (!event.relatedTarget) show(false); });
    document.addEventListener('drop', (event) => {
        show(false);
        if (!hasFiles(event) || taken(event)) return;
        event.preventDefault();
        const files = new DataTransfer();
        files.items.add(event.dataTransfer.files[0]);
        input.files = files.files;
        input.dispatchEvent(new Event('change', { bubbles: true }));
    });

    // A picture slider's handle takes the focus, and the arrow keys drag it.
    const drag = (handle, by) => {
        const box = handle.getBoundingClientRect();
        const fire = (target, kind, x) => target.dispatchEvent(new MouseEvent(kind, {
            bubbles: true, cancelable: true, view: window, clientX: x, clientY: box.top + box.height / 2,
        }));
        const x = box.left + box.width / 2;
        fire(handle, 'mousedown', x);
        fire(window, 'mousemove', x + by);
        fire(window, 'mouseup', x + by);
    };
    const share = (handle) => {
        const box = handle.parentElement.getBoundingClientRect();
        const at = handle.getBoundingClientRect();
        return Math.round(100 * Math.min(1, Math.max(0, (at.left + at.width / 2 - box.left) / box.width)));
    };
    const prepare = (handle) => {
        const label = handle.closest('.block')?.querySelector('[data-testid=block-label]')?.textContent.trim() ?? '';
        for (const [i, image] of handle.closest('.block').querySelectorAll('img').entries()) {
            if (!image.alt) image.alt = label.split(' | ')[i] ?? label;
        }
        if (handle.tabIndex === 0) return;
        handle.tabIndex = 0;
        for (const [name, value] of Object.entries({
            role: 'slider', 'aria-label': label, 'aria-valuemin': 0, 'aria-valuemax': 100, 'aria-valuenow': share(handle),
        })) handle.setAttribute(name, value);
        handle.addEventListener('keydown', (event) => {
            const step = { ArrowLeft: -20, ArrowRight: 20 }[event.key];
            if (!step) return;
            event.preventDefault();
            drag(handle, step);
            requestAnimationFrame(() => handle.setAttribute('aria-valuenow', share(handle)));
        });
    };
    // On the Taste tab the arrow keys choose, wherever no other thing takes them.
    document.addEventListener('keydown', (event) => {
        const button = document.querySelector({ ArrowLeft: '#taste-left', ArrowRight: '#taste-right' }[event.key] ?? '#none');
        const taken = event.target.closest?.('input, textarea, select, [role=slider], [role=tab], [role=listbox]');
        if (!button?.offsetParent || taken || event.ctrlKey || event.altKey || event.metaKey) return;
        event.preventDefault();
        button.click();
    });

    const look = () => {
        document.querySelectorAll('[data-testid=slider]').forEach(prepare);
        for (const image of document.querySelectorAll('.block img[alt=""]')) {
            image.alt = image.closest('.block').querySelector('[data-testid=block-label]')?.textContent.trim() ?? '';
        }
    };
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
    look();
}
